"""Jobs: the command line, typed options, plugins, run folders."""
