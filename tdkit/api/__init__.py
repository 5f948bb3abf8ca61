"""tdkit's jobs, one file each: names, files or objects in, records out. The only way in."""
