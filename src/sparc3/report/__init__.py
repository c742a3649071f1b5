"""Report: a run folder as one self-contained HTML file."""
