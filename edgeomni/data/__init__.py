"""Training and test data: samples, readers of other projects' formats, checks, synthesized speech. No torch."""
