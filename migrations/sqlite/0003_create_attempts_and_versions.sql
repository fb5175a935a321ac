-- What the learner makes: attempts at a period, versions, aliases, probe sets, the matrix of scores.

CREATE TABLE attempts (
    pipeline        TEXT    NOT NULL,
    period_ms       INTEGER NOT NULL,
    -- 1, 2, ... within the period.
    number          INTEGER NOT NULL CHECK (number > 0),
    -- The program that trains it; another one begins a further attempt.
    program_version TEXT    NOT NULL,
    -- What `latest` named when the period began training: the teacher; null: none.
    parent          INTEGER,
    -- The newest start; each owns one prefix in the store. 0: none yet.
    start           INTEGER NOT NULL DEFAULT 0 CHECK (start >= 0),
    -- Starts that ended in a failure of the training process, and what the last one said.
    failures        INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    last_failure    TEXT,
    PRIMARY KEY (pipeline, period_ms, number),
    FOREIGN KEY (pipeline, period_ms) REFERENCES periods (pipeline, period_ms)
) STRICT;

-- Numbers given out. A version's parent is its attempt's.
CREATE TABLE versions (
    pipeline        TEXT    NOT NULL,
    version         INTEGER NOT NULL CHECK (version > 0),
    period_ms       INTEGER NOT NULL,
    attempt         INTEGER NOT NULL,
    -- When the number was drawn: the manifest states it, so that whoever publishes writes the same bytes.
    reserved_at_ms  INTEGER NOT NULL,
    -- The manifest as it was written and when: both null until the version is visible.
    manifest        TEXT,
    published_at_ms INTEGER,
    PRIMARY KEY (pipeline, version),
    UNIQUE (pipeline, period_ms, attempt),
    FOREIGN KEY (pipeline, period_ms, attempt) REFERENCES attempts (pipeline, period_ms, number),
    CHECK ((manifest IS NULL) = (published_at_ms IS NULL))
) STRICT;

-- A period brings at most one visible version.
CREATE UNIQUE INDEX versions_one_visible ON versions (pipeline, period_ms) WHERE published_at_ms IS NOT NULL;

CREATE TABLE version_files (
    pipeline TEXT    NOT NULL,
    version  INTEGER NOT NULL,
    -- Name relative to the version's prefix.
    path     TEXT    NOT NULL CHECK (path <> ''),
    -- Place in the list as it was given.
    ordinal  INTEGER NOT NULL CHECK (ordinal >= 0),
    sha256   TEXT    NOT NULL CHECK (length(sha256) = 64),
    bytes    INTEGER NOT NULL CHECK (bytes >= 0),
    PRIMARY KEY (pipeline, version, path),
    FOREIGN KEY (pipeline, version) REFERENCES versions (pipeline, version)
) STRICT;

CREATE TABLE aliases (
    pipeline TEXT    NOT NULL,
    alias    TEXT    NOT NULL CHECK (alias <> ''),
    version  INTEGER NOT NULL,
    PRIMARY KEY (pipeline, alias),
    FOREIGN KEY (pipeline, version) REFERENCES versions (pipeline, version)
) STRICT;

-- Frames of a period that are never trained on and stay when its segments are gone.
CREATE TABLE probe_sets (
    pipeline  TEXT    NOT NULL,
    period_ms INTEGER NOT NULL,
    path      TEXT    NOT NULL CHECK (path <> ''),
    sha256    TEXT    NOT NULL CHECK (length(sha256) = 64),
    bytes     INTEGER NOT NULL CHECK (bytes > 0),
    frames    INTEGER NOT NULL CHECK (frames > 0),
    PRIMARY KEY (pipeline, period_ms),
    FOREIGN KEY (pipeline, period_ms) REFERENCES periods (pipeline, period_ms)
) STRICT;

CREATE TABLE scores (
    pipeline  TEXT    NOT NULL,
    version   INTEGER NOT NULL,
    -- The period whose probe set was measured.
    period_ms INTEGER NOT NULL,
    -- knn, linear, few_shot, cka, ...
    measure   TEXT    NOT NULL CHECK (measure <> ''),
    -- Null: measured, and not a number.
    value     REAL,
    PRIMARY KEY (pipeline, version, period_ms, measure),
    FOREIGN KEY (pipeline, version) REFERENCES versions (pipeline, version),
    FOREIGN KEY (pipeline, period_ms) REFERENCES periods (pipeline, period_ms)
) STRICT;
