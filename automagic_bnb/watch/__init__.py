"""What watches an optimizer and shows it: logs, callbacks, monitor, plots. Nothing below imports from here."""
