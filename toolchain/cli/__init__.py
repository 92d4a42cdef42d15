"""The command line: parse -> call one stage -> print. One file per command; nothing here knows how to quantize."""
