"""The torch reference runtime: an OmniModel behind the three component protocols."""
