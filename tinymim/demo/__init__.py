"""``tinymim demo``: from drawn scenes (or your photos) to a deployed, measured segmentor, and its HTML report."""
