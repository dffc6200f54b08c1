"""What a feature means, and how sure one can be: examples of where it fires, judges that read them, scores, and pages."""
