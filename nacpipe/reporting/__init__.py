"""What people look at: the report, its figures, pictures of images."""
