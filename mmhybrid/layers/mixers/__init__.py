"""Token mixers made of a selective scan, one file each; two share directional.py."""
