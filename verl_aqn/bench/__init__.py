"""The measurements of the README, side by side with their peers in one run."""
