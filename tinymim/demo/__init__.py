"""``tinymim demo``: drawn scenes (or your photos) to a deployed, measured segmentor, and the page that shows it."""
