"""Studies: tables of cells x seeds, compared with the numbers of a paper; built on training and segmentation."""
