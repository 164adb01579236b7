"""Numbers about images and texts: pure functions over arrays, strings and detections, without models of their own."""
