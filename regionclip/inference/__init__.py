"""Detection and region features over images and videos."""
