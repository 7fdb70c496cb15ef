"""What is on disk: image lists, class folders, benchmark files, OpenOOD's archives. No torch, no pixels."""
