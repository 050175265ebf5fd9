"""What goes on every unit: recipe, root file system, boot files, disk, block map, description."""
