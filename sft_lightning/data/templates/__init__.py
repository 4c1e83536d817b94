"""Messages → text segments, each supervised or not; templates as data, and Jinja."""
