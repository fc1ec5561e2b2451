"""Studies: tables of stages x seeds, beside the numbers of a paper; above training and segmentation."""
