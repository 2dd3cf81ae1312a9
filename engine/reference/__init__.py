"""Reference pictures at work: four methods, strengths per picture and step, masks."""
