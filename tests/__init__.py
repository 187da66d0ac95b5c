"""The suite. `oracle` says what is right, `budget` how close is close enough, `cases` what is tried."""
