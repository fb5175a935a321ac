-- What ingest knows: incarnations of topics, positions of their partitions. Every table is keyed by `pipeline`, so
-- that several pipelines share one database. Columns that end in _ms are milliseconds since 1970-01-01T00:00:00Z.

-- What there is one of for each pipeline. A row appears with the first value.
CREATE TABLE pipelines (
    pipeline        TEXT    NOT NULL PRIMARY KEY CHECK (pipeline <> ''),
    -- The stream's watermark; null until the first one. Never falls.
    watermark_ms    INTEGER,
    -- The newest topic generation given out, over all topics of the pipeline. Never falls.
    last_generation INTEGER NOT NULL DEFAULT 0 CHECK (last_generation >= 0),
    -- The newest version number given out. Never falls: a number is never given twice.
    last_version    INTEGER NOT NULL DEFAULT 0 CHECK (last_version >= 0)
) STRICT;

-- One row for each incarnation of a topic. Rows of past incarnations stay: object names hold their ids.
CREATE TABLE topics (
    pipeline   TEXT    NOT NULL,
    -- The generation as it stands in object names, g000001; unique over all topics of the pipeline.
    topic_id   TEXT    NOT NULL CHECK (topic_id <> ''),
    topic      TEXT    NOT NULL CHECK (topic <> ''),
    -- What the client saw of the incarnation: the cluster's id, or the run of an in-process broker.
    identity   TEXT    NOT NULL,
    is_current INTEGER NOT NULL CHECK (is_current IN (0, 1)),
    PRIMARY KEY (pipeline, topic_id)
) STRICT;

CREATE UNIQUE INDEX topics_one_current ON topics (pipeline, topic) WHERE is_current = 1;

CREATE TABLE partitions (
    pipeline               TEXT    NOT NULL,
    topic_id               TEXT    NOT NULL,
    partition              INTEGER NOT NULL CHECK (partition >= 0),
    -- The next offset to read; null: known from Kafka's metadata, not read by anyone yet.
    position               INTEGER CHECK (position >= 0),
    -- The largest event time that committed frames and punctuations vouch for. Never falls.
    watermark_ms           INTEGER,
    -- The owner's last report that the partition was at its end; both null: none, or something came since.
    caught_up_answered_ms  INTEGER,
    caught_up_quiet_ms     INTEGER,
    PRIMARY KEY (pipeline, topic_id, partition),
    FOREIGN KEY (pipeline, topic_id) REFERENCES topics (pipeline, topic_id),
    CHECK ((caught_up_answered_ms IS NULL) = (caught_up_quiet_ms IS NULL))
) STRICT;

-- Offsets that retention removed before anyone read them: half open.
CREATE TABLE lost_ranges (
    pipeline     TEXT    NOT NULL,
    topic_id     TEXT    NOT NULL,
    partition    INTEGER NOT NULL,
    start_offset INTEGER NOT NULL CHECK (start_offset >= 0),
    end_offset   INTEGER NOT NULL,
    PRIMARY KEY (pipeline, topic_id, partition, start_offset),
    FOREIGN KEY (pipeline, topic_id, partition) REFERENCES partitions (pipeline, topic_id, partition),
    CHECK (start_offset < end_offset)
) STRICT;
