"""What the subcommands do once their options are read; these modules may import anything."""
