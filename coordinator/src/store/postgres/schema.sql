-- Schema 1. State rows are keyed by id and replaced; history only grows. The leadership row is the one
-- that coordinators of every version read, so it never changes.
CREATE TABLE muster.meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- One row. Renewals change `beat` alone, so they never wait for a writer, which holds the row's key;
-- a takeover changes the unique `term`, so it waits for every write of the leader before.
CREATE TABLE muster.leadership (
    one     BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
    term    BIGINT NOT NULL UNIQUE,
    holder  TEXT,             -- random per process; none: whoever comes first may lead
    address TEXT,             -- where agents and operators dial it
    beat    BIGINT NOT NULL   -- grows with each renewal
);
INSERT INTO muster.leadership (term, beat) VALUES (0, 0);

-- One row. Each commit moves it on by one, so the outcome of a commit whose answer was cut off can be read.
CREATE TABLE muster.commits (
    one    BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
    number BIGINT NOT NULL
);
INSERT INTO muster.commits (number) VALUES (0);

-- First in every transaction that writes: fails it unless its writer leads.
CREATE FUNCTION muster.fence(mine BIGINT) RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM muster.leadership WHERE term = mine FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another coordinator leads' USING ERRCODE = 'MU001';
    END IF;
END $$;

-- Then, in a batch: fails it if it was committed before, or another came between.
CREATE FUNCTION muster.follow(previous BIGINT) RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
    UPDATE muster.commits SET number = previous + 1 WHERE number = previous;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'commit % is not the last one', previous USING ERRCODE = 'MU002';
    END IF;
END $$;

CREATE TABLE muster.jobs (
    id       BIGINT PRIMARY KEY,
    key      TEXT NOT NULL UNIQUE,
    digest   BYTEA NOT NULL,
    template BYTEA NOT NULL,  -- muster.v1.JobTemplate
    record   TEXT NOT NULL    -- JobRecord, JSON
);

CREATE TABLE muster.nodes (
    id     BIGINT PRIMARY KEY,
    record TEXT NOT NULL      -- NodeRecord, JSON
);

CREATE TABLE muster.pools (
    name   TEXT PRIMARY KEY,
    record TEXT NOT NULL      -- PoolRecord, JSON
);

CREATE TABLE muster.attempts (
    job    BIGINT NOT NULL,
    task   BIGINT NOT NULL,
    number BIGINT NOT NULL,
    ended  BOOLEAN NOT NULL,
    record TEXT NOT NULL,     -- AttemptRecord, JSON
    detail BYTEA,             -- muster.v1.AttemptEnded
    PRIMARY KEY (job, task, number)
);
CREATE INDEX attempts_live ON muster.attempts (job, task) WHERE NOT ended;

CREATE TABLE muster.history (
    revision BIGINT PRIMARY KEY,
    time     BIGINT NOT NULL,
    subject  TEXT NOT NULL,   -- "job/7k2", "node/n3", "pool/local", "fleet"
    kind     TEXT NOT NULL,
    reason   TEXT NOT NULL,
    actor    TEXT,
    sizes    TEXT             -- "from,to" of a scaling decision
);
CREATE INDEX history_subject ON muster.history (subject, revision);

CREATE TABLE muster.evidence (
    revision BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record   TEXT NOT NULL    -- Evidence, JSON
);

CREATE TABLE muster.tokens (
    id      BYTEA PRIMARY KEY,
    secret  BYTEA NOT NULL,   -- SHA-256 of the secret
    pool    TEXT NOT NULL,
    host    BIGINT,
    expires BIGINT NOT NULL,
    used_by BYTEA             -- SHA-256 of the first key that used it
);
