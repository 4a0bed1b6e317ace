"""Attribution: the scorers that tell how much a candidate token draws on the region of interest."""
