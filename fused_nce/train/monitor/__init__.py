"""What a run says of itself while it trains: log, boards, profile, two classifiers beside the encoder."""
