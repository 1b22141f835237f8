"""What the subcommands of ``lightning-mmd`` do, one a file."""
