"""``mmhybrid init``: from a folder of pictures and annotations to a config that trains."""
