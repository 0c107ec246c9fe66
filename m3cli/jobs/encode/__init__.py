"""`m3 encode`: resolve the configuration, open the folder, run the pipeline, report."""
