"""What several engines share: embedding tables read from a file, and the streaming codec less its engine."""
