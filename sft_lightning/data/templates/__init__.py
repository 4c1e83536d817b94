"""Messages → text segments, each supervised or not: named templates as data, and Jinja templates."""
