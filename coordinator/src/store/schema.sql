-- Schema 2. State rows are keyed by id and replaced; history only grows. `seal` is a checksum of its row.
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    seal INTEGER NOT NULL AS (checksum('meta', name, value)) STORED
) WITHOUT ROWID;

CREATE TABLE jobs (
    id       INTEGER PRIMARY KEY,
    key      TEXT NOT NULL UNIQUE,
    digest   BLOB NOT NULL,
    template BLOB NOT NULL,   -- muster.v1.JobTemplate
    record   TEXT NOT NULL,   -- JobRecord, JSON
    seal INTEGER NOT NULL AS (checksum('jobs', id, key, digest, template, record)) STORED
);

CREATE TABLE nodes (
    id     INTEGER PRIMARY KEY,
    record TEXT NOT NULL,     -- NodeRecord, JSON
    seal INTEGER NOT NULL AS (checksum('nodes', id, record)) STORED
);

CREATE TABLE pools (
    name   TEXT PRIMARY KEY,
    record TEXT NOT NULL,     -- PoolRecord, JSON
    seal INTEGER NOT NULL AS (checksum('pools', name, record)) STORED
) WITHOUT ROWID;

CREATE TABLE attempts (
    job    INTEGER NOT NULL,
    task   INTEGER NOT NULL,
    number INTEGER NOT NULL,
    ended  INTEGER NOT NULL,  -- 0 while it is live
    record TEXT NOT NULL,     -- AttemptRecord, JSON
    detail BLOB,              -- muster.v1.AttemptEnded
    seal INTEGER NOT NULL AS (checksum('attempts', job, task, number, ended, record, detail)) STORED,
    PRIMARY KEY (job, task, number)
) WITHOUT ROWID;
CREATE INDEX attempts_live ON attempts (ended) WHERE ended = 0;

CREATE TABLE history (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    time     INTEGER NOT NULL,
    subject  TEXT NOT NULL,   -- "job/7k2", "node/n3", "pool/local", "fleet"
    kind     TEXT NOT NULL,
    reason   TEXT NOT NULL,
    actor    TEXT,
    sizes    TEXT,            -- "from,to" of a scaling decision
    seal INTEGER NOT NULL AS (checksum('history', revision, time, subject, kind, reason, actor, sizes)) STORED
);
CREATE INDEX history_subject ON history (subject, revision);

CREATE TABLE evidence (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    record   TEXT NOT NULL,   -- Evidence, JSON
    seal INTEGER NOT NULL AS (checksum('evidence', revision, record)) STORED
);

CREATE TABLE tokens (
    id      BLOB PRIMARY KEY,
    secret  BLOB NOT NULL,    -- SHA-256 of the secret
    pool    TEXT NOT NULL,
    host    INTEGER,
    expires INTEGER NOT NULL,
    used_by BLOB,             -- SHA-256 of the first key that used it
    seal INTEGER NOT NULL AS (checksum('tokens', id, secret, pool, host, expires, used_by)) STORED
) WITHOUT ROWID;
