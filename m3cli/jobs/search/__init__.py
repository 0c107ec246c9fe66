"""`m3 search`: exact search of an encoded folder."""
