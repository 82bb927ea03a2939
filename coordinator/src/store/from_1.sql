-- From schema 1: its tables go aside, to be copied into those of the schema now in force.
ALTER TABLE meta RENAME TO meta_1;
ALTER TABLE jobs RENAME TO jobs_1;
ALTER TABLE nodes RENAME TO nodes_1;
ALTER TABLE pools RENAME TO pools_1;
ALTER TABLE attempts RENAME TO attempts_1;
ALTER TABLE history RENAME TO history_1;
ALTER TABLE evidence RENAME TO evidence_1;
ALTER TABLE tokens RENAME TO tokens_1;
DROP INDEX attempts_live;
DROP INDEX history_subject;
