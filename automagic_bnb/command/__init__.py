"""What `automagic-bnb` runs on the command line. Nothing else imports from here."""
