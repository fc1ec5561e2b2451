"""Photo folders, views for teacher and student, labelled folders, generated scenes. Import the module you need."""
