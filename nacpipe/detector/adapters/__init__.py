"""The detector behind other libraries' interfaces."""
