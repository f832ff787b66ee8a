"""From images of any size to label maps, overlays and slots."""
