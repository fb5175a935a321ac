-- Periods and the segments of frames that belong to them. A period's id is the instant at which it starts: period_ms.

CREATE TABLE periods (
    pipeline        TEXT    NOT NULL,
    period_ms       INTEGER NOT NULL,
    -- The first instant after it.
    end_ms          INTEGER NOT NULL,
    state           TEXT    NOT NULL CHECK (state IN ('open', 'sealed', 'merged', 'training', 'evaluating',
                                                      'published', 'rejected', 'failed', 'expired')),
    -- 1: an operator has asked for it to be closed whatever the watermark.
    close_requested INTEGER NOT NULL DEFAULT 0 CHECK (close_requested IN (0, 1)),
    -- When its segment list became final; a merged period counts as sealed.
    sealed_at_ms    INTEGER,
    -- When it became published, rejected or failed.
    settled_at_ms   INTEGER,
    -- When its frames were deleted.
    expired_at_ms   INTEGER,
    -- The period that got its frames.
    merged_into_ms  INTEGER,
    -- Why it was rejected or failed; kept after expiry.
    reason          TEXT,
    -- An operator's retries so far.
    retries         INTEGER NOT NULL DEFAULT 0 CHECK (retries >= 0),
    -- What its live segments added up to when they left it (merged, expired); null while they can be counted.
    final_frames    INTEGER CHECK (final_frames >= 0),
    final_bytes     INTEGER CHECK (final_bytes >= 0),
    PRIMARY KEY (pipeline, period_ms),
    FOREIGN KEY (pipeline, merged_into_ms) REFERENCES periods (pipeline, period_ms),
    CHECK (end_ms > period_ms),
    CHECK ((state = 'open') = (sealed_at_ms IS NULL)),
    CHECK ((state IN ('published', 'rejected', 'failed', 'expired')) = (settled_at_ms IS NOT NULL)),
    CHECK ((state = 'expired') = (expired_at_ms IS NOT NULL)),
    CHECK ((state = 'merged') = (merged_into_ms IS NOT NULL)),
    CHECK (merged_into_ms IS NULL OR merged_into_ms > period_ms),
    CHECK (state NOT IN ('rejected', 'failed') OR reason IS NOT NULL),
    CHECK ((state IN ('merged', 'expired')) = (final_frames IS NOT NULL)),
    CHECK ((final_frames IS NULL) = (final_bytes IS NULL))
) STRICT;

-- The live segments: an object of the store without a row here holds nothing.
CREATE TABLE segments (
    pipeline        TEXT    NOT NULL,
    -- The object's name; it holds the period for which the frames were written.
    path            TEXT    NOT NULL CHECK (path <> ''),
    -- The period to which the frames belong now: a merge changes it.
    period_ms       INTEGER NOT NULL,
    topic_id        TEXT    NOT NULL,
    partition       INTEGER NOT NULL,
    -- Offsets of the whole flush that wrote it, half open. A flush writes at most one segment a period.
    flush_start     INTEGER NOT NULL CHECK (flush_start >= 0),
    flush_end       INTEGER NOT NULL,
    sha256          TEXT    NOT NULL CHECK (length(sha256) = 64),
    bytes           INTEGER NOT NULL CHECK (bytes > 0),
    frames          INTEGER NOT NULL CHECK (frames > 0),
    -- The smallest and the largest capture time of its frames.
    captured_min_ms INTEGER NOT NULL,
    captured_max_ms INTEGER NOT NULL,
    PRIMARY KEY (pipeline, path),
    FOREIGN KEY (pipeline, period_ms) REFERENCES periods (pipeline, period_ms),
    FOREIGN KEY (pipeline, topic_id, partition) REFERENCES partitions (pipeline, topic_id, partition),
    CHECK (flush_start < flush_end),
    CHECK (captured_min_ms <= captured_max_ms)
) STRICT;

CREATE INDEX segments_by_period ON segments (pipeline, period_ms);
