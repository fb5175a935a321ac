-- Who may act as the one learner. A row stays when the lease is free: its token must not fall.
CREATE TABLE leases (
    pipeline      TEXT    NOT NULL,
    name          TEXT    NOT NULL CHECK (name <> ''),
    -- Null: released.
    holder        TEXT,
    -- Raised by every acquisition, so that what an earlier one still has in flight is refused.
    token         INTEGER NOT NULL CHECK (token > 0),
    expires_at_ms INTEGER NOT NULL,
    PRIMARY KEY (pipeline, name)
) STRICT;
