"""`m3 search`: queries against a folder, by vectors or by words."""
