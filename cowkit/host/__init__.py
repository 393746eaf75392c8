"""What runs in the host process: the disks of ``CowDisk(server="process")``. See :mod:`cowkit.hosting`."""
