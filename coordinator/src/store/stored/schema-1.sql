--
-- PostgreSQL database dump
--

\restrict YOWngsHcBOKeHN0OujdXl4WoSePEYtm5fFLKybszoAHy0cthxfVR2sSlRGGoWce

-- Dumped from database version 15.18 (Debian 15.18-0+deb12u1)
-- Dumped by pg_dump version 15.18 (Debian 15.18-0+deb12u1)

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

--
-- Name: muster; Type: SCHEMA; Schema: -; Owner: -
--

CREATE SCHEMA muster;


--
-- Name: fence(bigint); Type: FUNCTION; Schema: muster; Owner: -
--

CREATE FUNCTION muster.fence(mine bigint) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
    PERFORM 1 FROM muster.leadership WHERE term = mine FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another coordinator leads' USING ERRCODE = 'MU001';
    END IF;
END $$;


--
-- Name: follow(bigint); Type: FUNCTION; Schema: muster; Owner: -
--

CREATE FUNCTION muster.follow(previous bigint) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
    UPDATE muster.commits SET number = previous + 1 WHERE number = previous;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'commit % is not the last one', previous USING ERRCODE = 'MU002';
    END IF;
END $$;


SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: attempts; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.attempts (
    job bigint NOT NULL,
    task bigint NOT NULL,
    number bigint NOT NULL,
    ended boolean NOT NULL,
    record text NOT NULL,
    detail bytea
);


--
-- Name: commits; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.commits (
    one boolean DEFAULT true NOT NULL,
    number bigint NOT NULL,
    CONSTRAINT commits_one_check CHECK (one)
);


--
-- Name: evidence; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.evidence (
    revision bigint NOT NULL,
    record text NOT NULL
);


--
-- Name: evidence_revision_seq; Type: SEQUENCE; Schema: muster; Owner: -
--

ALTER TABLE muster.evidence ALTER COLUMN revision ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME muster.evidence_revision_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: history; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.history (
    revision bigint NOT NULL,
    "time" bigint NOT NULL,
    subject text NOT NULL,
    kind text NOT NULL,
    reason text NOT NULL,
    actor text,
    sizes text
);


--
-- Name: jobs; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.jobs (
    id bigint NOT NULL,
    key text NOT NULL,
    digest bytea NOT NULL,
    template bytea NOT NULL,
    record text NOT NULL
);


--
-- Name: leadership; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.leadership (
    one boolean DEFAULT true NOT NULL,
    term bigint NOT NULL,
    holder text,
    address text,
    beat bigint NOT NULL,
    CONSTRAINT leadership_one_check CHECK (one)
);


--
-- Name: meta; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.meta (
    name text NOT NULL,
    value text NOT NULL
);


--
-- Name: nodes; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.nodes (
    id bigint NOT NULL,
    record text NOT NULL
);


--
-- Name: pools; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.pools (
    name text NOT NULL,
    record text NOT NULL
);


--
-- Name: tokens; Type: TABLE; Schema: muster; Owner: -
--

CREATE TABLE muster.tokens (
    id bytea NOT NULL,
    secret bytea NOT NULL,
    pool text NOT NULL,
    host bigint,
    expires bigint NOT NULL,
    used_by bytea
);


--
-- Data for Name: attempts; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.attempts VALUES (1024, 3, 1, true, '{"node":2,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 2 %","placed":1795789703380,"started":1795789703421,"stopping":null,"ended":{"end":"succeeded","at":1795789703421,"presumed":false}}', '\x0a95020a020a00120b08021880a0870320003001220608011a02330a3a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348e7525210104818c60b20af1d28c0023021388a1e12fc010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310e7521a10104818c60b20af1d28c0023021388a1e');
INSERT INTO muster.attempts VALUES (1024, 0, 1, true, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703380,"started":1795789703435,"stopping":null,"ended":{"end":"succeeded","at":1795789703435,"presumed":false}}', '\x0a95020a020a00120b08021880c08a0320003001220608011a02300a3a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348c7705210103918d40120ae2628af01300a38963c12fc010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310c7701a10103918d40120ae2628af01300a38963c');
INSERT INTO muster.attempts VALUES (1024, 1, 1, true, '{"node":2,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703380,"started":1795789703435,"stopping":null,"ended":{"end":"succeeded","at":1795789703435,"presumed":false}}', '\x0a99020a020a00120d08021880a0ff0220b9880330011808220608011a02310a3a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348ba9301520f106418831120a440282b301538804c12fc010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310ba93011a0f106418831120a440282b301538804c');
INSERT INTO muster.attempts VALUES (1024, 2, 1, true, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 2 %","placed":1795789703380,"started":1795789703435,"stopping":null,"ended":{"end":"succeeded","at":1795789703435,"presumed":false}}', '\x0a98020a020a00120c08021880c08a0320bf3230011801220608011a02320a3a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348895952101033188a0120f91228b502301538d52912fc010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e731089591a101033188a0120f91228b502301538d529');
INSERT INTO muster.attempts VALUES (1024, 4, 1, true, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 5 %","placed":1795789703380,"started":1795789703435,"stopping":null,"ended":{"end":"succeeded","at":1795789703435,"presumed":false}}', '\x0a95020a020a00120b08011880c08a0320003001220608011a02340a3a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348d16352101035188a11209f16289c03300838ee3512fc010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310d1631a101035188a11209f16289c03300838ee35');
INSERT INTO muster.attempts VALUES (1025, 0, 1, true, '{"node":2,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703446,"started":1795789703455,"stopping":null,"ended":{"end":{"exited":3},"at":1795789703455,"presumed":false}}', '\x0a88020a021003120b08011880a08703200030013a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348a913520b08011002285f300738fb1012f7010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310a9131a0b08011002285f300738fb10');
INSERT INTO muster.attempts VALUES (1025, 0, 2, true, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703706,"started":1795789703713,"stopping":null,"ended":{"end":{"exited":3},"at":1795789703713,"presumed":false}}', '\x0a89020a021003120b08011880c08a03200030013a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348cf04520c0801100128ad01301838f10112f8010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310cf041a0c0801100128ad01301838f101');
INSERT INTO muster.attempts VALUES (1027, 0, 1, false, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703793,"started":1795789703818,"stopping":null,"ended":null}', NULL);
INSERT INTO muster.attempts VALUES (1026, 0, 1, true, '{"node":2,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703737,"started":1795789703756,"stopping":[1795789703765,"cancelled"],"ended":{"end":"cancelled","at":1795789703773,"presumed":false}}', '\x0a8d020a023a00120d08021880a0870320f5b109300118183a066e732e7069643a086e732e6d6f756e743a066e732e6970633a066e732e7574733a066e732e6e65743a096e732e6367726f75703a076e732e757365723a0d726f6f742e726561646f6e6c793a0b70726f632e7375627365743a077569642e6f776e3a09636170732e6e6f6e653a0c6e6f5f6e65775f70726976733a07736563636f6d703a086c616e646c6f636b3a07726c696d6974733a0b64657363726970746f72733a0773657373696f6e3a076b657972696e673a0864756d7061626c653a0b6c696d6974732e6469736b3a0b6b696c6c2e6367726f75703a0a6b696c6c2e7069646e7348a815520c0801100128f701301338ca1112f8010a066e732e7069640a086e732e6d6f756e740a066e732e6970630a066e732e7574730a066e732e6e65740a096e732e6367726f75700a076e732e757365720a0d726f6f742e726561646f6e6c790a0b70726f632e7375627365740a077569642e6f776e0a09636170732e6e6f6e650a0c6e6f5f6e65775f70726976730a07736563636f6d700a086c616e646c6f636b0a07726c696d6974730a0b64657363726970746f72730a0773657373696f6e0a076b657972696e670a0864756d7061626c650a0b6c696d6974732e6469736b0a0b6b696c6c2e6367726f75700a0a6b696c6c2e7069646e7310a8151a0c0801100128f701301338ca11');
INSERT INTO muster.attempts VALUES (1028, 0, 1, false, '{"node":2,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 0 %","placed":1795789703829,"started":1795789703847,"stopping":null,"ended":null}', NULL);
INSERT INTO muster.attempts VALUES (1029, 0, 1, false, '{"node":1,"incarnation":1,"term":1795789702842,"placement_reason":"spread: least loaded of 2 nodes, at 2 %","placed":1795789703862,"started":1795789703883,"stopping":null,"ended":null}', NULL);


--
-- Data for Name: commits; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.commits VALUES (true, 24);


--
-- Data for Name: evidence; Type: TABLE DATA; Schema: muster; Owner: -
--



--
-- Data for Name: history; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.history VALUES (1, 1795789702874, 'fleet', 'led', 'this coordinator leads with term 1795789702842', NULL, NULL);
INSERT INTO muster.history VALUES (2, 1795789702988, 'node/n1', 'enrolled', '`n1` joined pool `default`', NULL, NULL);
INSERT INTO muster.history VALUES (3, 1795789703032, 'node/n1', 'connected', '4 CPU, 0.1.0, 6.18.44-fc-v669', NULL, NULL);
INSERT INTO muster.history VALUES (4, 1795789703095, 'node/n2', 'enrolled', '`n2` joined pool `default`', NULL, NULL);
INSERT INTO muster.history VALUES (5, 1795789703371, 'node/n2', 'connected', '4 CPU, 0.1.0, 6.18.44-fc-v669', NULL, NULL);
INSERT INTO muster.history VALUES (6, 1795789703380, 'job/100', 'submitted', '5 tasks of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (7, 1795789703435, 'job/100', 'finished', '5 succeeded, 0 failed, 0 cancelled', NULL, NULL);
INSERT INTO muster.history VALUES (8, 1795789703446, 'job/101', 'submitted', '1 task of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (9, 1795789703455, 'job/101', 'attempt_ended', 'attempt 101.0.1: exited(3); it is placed again after a pause', NULL, NULL);
INSERT INTO muster.history VALUES (10, 1795789703713, 'job/101', 'attempt_ended', 'attempt 101.0.2: exited(3)', NULL, NULL);
INSERT INTO muster.history VALUES (11, 1795789703713, 'job/101', 'finished', '0 succeeded, 1 failed, 0 cancelled', NULL, NULL);
INSERT INTO muster.history VALUES (12, 1795789703737, 'job/102', 'submitted', '1 task of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (13, 1795789703765, 'job/102', 'cancelled', 'enough', 'uid:0', NULL);
INSERT INTO muster.history VALUES (14, 1795789703773, 'job/102', 'attempt_ended', 'attempt 102.0.1: cancelled', NULL, NULL);
INSERT INTO muster.history VALUES (15, 1795789703773, 'job/102', 'finished', '0 succeeded, 0 failed, 1 cancelled', NULL, NULL);
INSERT INTO muster.history VALUES (16, 1795789703793, 'job/103', 'submitted', '1 task of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (17, 1795789703829, 'job/104', 'submitted', '1 task of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (18, 1795789703862, 'job/105', 'submitted', '1 task of 0.1 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (19, 1795789703892, 'job/106', 'submitted', '1 task of 4 CPU', 'uid:0', NULL);
INSERT INTO muster.history VALUES (20, 1795789703894, 'node/n2', 'drain_requested', 'a test (deadline in 49m59s, then nothing)', 'uid:0', NULL);


--
-- Data for Name: jobs; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.jobs VALUES (1024, 'test-d1fbe95ec0b3d3ec', '\x04db5e63b8084a1a5530678f618f535dd5a94e8182cff94a154c2bf9bb11550c', '\x0a056172726179127e12072f62696e2f736812022d6312196563686f20244d55535445525f5441534b3b20657869742030420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736001680178e80780018080802088018008900105a201057569643a301805', '{"spec":{"name":"array","owner":"uid:0","pool":null,"priority":0,"tasks":5,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_least_once","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-d1fbe95ec0b3d3ec","digest":[4,219,94,99,184,8,74,26,85,48,103,143,97,143,83,93,213,169,78,129,130,207,249,74,21,76,43,249,187,17,85,12],"submitted":1795789703380,"finished":1795789703435,"cancelled_by":null,"waiting":[],"delayed":[],"ended":{"succeeded":[[0,5]]},"tallies":{},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1029, 'test-b96a29650731c5ef', '\x3c97805515e54c2d68bd80d1cc6b456115482c00307d08ac867982531341af82', '\x0a056f6674656e126e12072f62696e2f736812022d631209736c65657020363030420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736001680178e80780018080802088018008900101a201057569643a301801', '{"spec":{"name":"often","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_least_once","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-b96a29650731c5ef","digest":[60,151,128,85,21,229,76,45,104,189,128,209,204,107,69,97,21,72,44,0,48,125,8,172,134,121,130,83,19,65,175,130],"submitted":1795789703862,"finished":null,"cancelled_by":null,"waiting":[],"delayed":[],"ended":{},"tallies":{},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1026, 'test-13ba50e6ae0c0175', '\xc55eebb58f5414ab5e1a6ba3c38100dd2481db046d0466f06a3c489ffdf311be', '\x0a0963616e63656c6c6564126e12072f62696e2f736812022d631209736c65657020363030420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736001680178e80780018080802088018008900101a201057569643a301801', '{"spec":{"name":"cancelled","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_least_once","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-13ba50e6ae0c0175","digest":[197,94,235,181,143,84,20,171,94,26,107,163,195,129,0,221,36,129,219,4,109,4,102,240,106,60,72,159,253,243,17,190],"submitted":1795789703737,"finished":1795789703773,"cancelled_by":["uid:0","enough"],"waiting":[],"delayed":[],"ended":{"cancelled":[[0,1]]},"tallies":{"0":{"attempts":1,"failed":0,"lost":0,"drained":0,"brought_down":[],"fenced_until":null}},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1025, 'test-ea5c1e7caadb0122', '\x1ff8b9a307e383aa6badea5f84c9446384b29ce5c9083a92a38776ffc5596877', '\x0a076661696c696e67126b12072f62696e2f736812022d631206657869742033420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736001680178e80780018080802088018008900101a201057569643a3018013a0408011002', '{"spec":{"name":"failing","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_least_once","on_drain":"finish","retries":{"failed":1,"lost":2,"drained":16},"time_limit":null,"grace":1000},"key":"test-ea5c1e7caadb0122","digest":[31,248,185,163,7,227,131,170,107,173,234,95,132,201,68,99,132,178,156,229,201,8,58,146,163,135,118,255,197,89,104,119],"submitted":1795789703446,"finished":1795789703713,"cancelled_by":null,"waiting":[],"delayed":[],"ended":{"exited(3)":[[0,1]]},"tallies":{"0":{"attempts":2,"failed":1,"lost":0,"drained":0,"brought_down":[],"fenced_until":null}},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1027, 'test-b03bd6bd1614cb87', '\x3c3dec1b0a06b777abe9d8e66789221e365897390220aea08b894c2389225e85', '\x0a096578636c7573697665126e12072f62696e2f736812022d631209736c65657020363030420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736003680178e80780018080802088018008900101a201057569643a301801', '{"spec":{"name":"exclusive","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","lease.timer","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"exclusive","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-b03bd6bd1614cb87","digest":[60,61,236,27,10,6,183,119,171,233,216,230,103,137,34,30,54,88,151,57,2,32,174,160,139,137,76,35,137,34,94,133],"submitted":1795789703793,"finished":null,"cancelled_by":null,"waiting":[],"delayed":[],"ended":{},"tallies":{},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1028, 'test-5071940d2f902063', '\x6b9e16c758084472a9a95dc86929b4f0c0507155c5000435461c3f8752c382c9', '\x0a046f6e6365126e12072f62696e2f736812022d631209736c65657020363030420c086410808080201880808008480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736002680178e80780018080802088018008900101a201057569643a301801', '{"spec":{"name":"once","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":100,"memory_bytes":67108864,"disk_bytes":16777216},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_most_once","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-5071940d2f902063","digest":[107,158,22,199,88,8,68,114,169,169,93,200,105,41,180,240,192,80,113,85,197,0,4,53,70,28,63,135,82,195,130,201],"submitted":1795789703829,"finished":null,"cancelled_by":null,"waiting":[],"delayed":[],"ended":{},"tallies":{},"cancelled_tasks":[],"held":[]}');
INSERT INTO muster.jobs VALUES (1030, 'test-56cd433c25ba0a83', '\x8988b98fc23dd05f37ff1413d5af718992904b27fcdfe0d9b604964c9769460c', '\x0a0777616974696e67126a12072f62696e2f736812022d631206657869742030420b08a01f1080804018808040480150015a0a6c696d6974732e6370755a0d6c696d6974732e6d656d6f72795a0b6c696d6974732e706964736001680178e80780018080802088018008900101a201057569643a301801', '{"spec":{"name":"waiting","owner":"uid:0","pool":null,"priority":0,"tasks":1,"request":{"cpu_milli":4000,"memory_bytes":1048576,"disk_bytes":1048576},"fences":["caps.none","kill.cgroup","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","uid.own"],"constraints":{},"delivery":"at_least_once","on_drain":"finish","retries":{"failed":0,"lost":3,"drained":16},"time_limit":null,"grace":1000},"key":"test-56cd433c25ba0a83","digest":[137,136,185,143,194,61,208,95,55,255,20,19,213,175,113,137,146,144,75,39,252,223,224,217,182,4,150,76,151,105,70,12],"submitted":1795789703892,"finished":null,"cancelled_by":null,"waiting":[[0,1]],"delayed":[],"ended":{},"tallies":{},"cancelled_tasks":[],"held":[]}');


--
-- Data for Name: leadership; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.leadership VALUES (true, 1795789702842, '43f29d688383d97ccae43627253e2042', '127.0.0.1:44661', 1);


--
-- Data for Name: meta; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.meta VALUES ('schema', '1');
INSERT INTO muster.meta VALUES ('fleet', '496159fcfd68893ebe02871562c1cc39');
INSERT INTO muster.meta VALUES ('counters', '{"term":1795789702842,"next_job":1031,"next_node":3,"next_host":1,"brake_until":null,"timeline":{"terms":[[1795789702842,0]],"accepted":0},"loss":null,"longest_lease":15000}');
INSERT INTO muster.meta VALUES ('clock', '1795789703894');


--
-- Data for Name: nodes; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.nodes VALUES (1, '{"name":"n1","pool":"default","key":[253,145,255,157,14,3,60,150,120,145,23,236,17,3,226,111,255,65,146,235,61,240,10,250,3,87,142,199,13,97,162,72],"host":null,"joined":1795789702988,"incarnation":1,"boot_id":"4af512e0-9644-42bd-97d4-2b4a5be5e119","instance":"087bd0016815cd1ffb8e3702a37c64a5","agent_start":1,"capacity":{"cpu_milli":4000,"memory_bytes":8589934592,"disk_bytes":49651556352},"labels":{},"fences":["caps.none","descriptors","dumpable","keyring","kill.cgroup","kill.pidns","landlock","lease.timer","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","session","uid.own"],"version":"0.1.0, 6.18.44-fc-v669","liveness":"live","duty":"eligible","hold":"none","faults":0,"attempts_total":6,"idle_since":null,"drain_revision":0}');
INSERT INTO muster.nodes VALUES (2, '{"name":"n2","pool":"default","key":[79,190,47,130,1,217,56,244,210,33,200,126,155,200,171,176,111,232,26,41,102,248,213,70,17,231,167,237,108,147,40,249],"host":null,"joined":1795789703095,"incarnation":1,"boot_id":"4af512e0-9644-42bd-97d4-2b4a5be5e119","instance":"eae6c89674c648a3529b8c4f31b07feb","agent_start":1,"capacity":{"cpu_milli":4000,"memory_bytes":8589934592,"disk_bytes":49651474432},"labels":{},"fences":["caps.none","descriptors","dumpable","keyring","kill.cgroup","kill.pidns","landlock","lease.timer","limits.disk","no_new_privs","ns.cgroup","ns.ipc","ns.mount","ns.net","ns.pid","ns.user","ns.uts","proc.subset","rlimits","root.readonly","seccomp","session","uid.own"],"version":"0.1.0, 6.18.44-fc-v669","liveness":"live","duty":{"draining":{"order":{"deadline":1795792703893,"then":"nothing","refusable":false,"actor":"uid:0","reason":"a test"},"revision":1,"requested":1795789703894,"cordon_before":null}},"hold":"none","faults":0,"attempts_total":5,"idle_since":null,"drain_revision":1}');


--
-- Data for Name: pools; Type: TABLE DATA; Schema: muster; Owner: -
--



--
-- Data for Name: tokens; Type: TABLE DATA; Schema: muster; Owner: -
--

INSERT INTO muster.tokens VALUES ('\xd8981c6a5ea3977056e6182a176d91ae', '\xca390f89260fc81b9f862137cd7d96b9ed2c3b86ee2bad1fa4fb12361ddc47ff', 'default', NULL, 1795793302903, '\xfd91ff9d0e033c96789117ec1103e26fff4192eb3df00afa03578ec70d61a248');
INSERT INTO muster.tokens VALUES ('\x321e72362f72c26dc5555c8eaebc6940', '\x26dd0eaaccab57658b617598e903228cb3efd72239f47f9c23fc5820f4fed242', 'default', NULL, 1795793303050, '\x4fbe2f8201d938f4d221c87e9bc8abb06fe81a2966f8d54611e7a7ed6c9328f9');
INSERT INTO muster.tokens VALUES ('\xa2a44f4bf40214626496020a893f0875', '\xac61d6491aff63630369dea8318350872aa555938f1df673d7dba77e3f9cd955', 'other', NULL, 1795793303898, NULL);


--
-- Name: evidence_revision_seq; Type: SEQUENCE SET; Schema: muster; Owner: -
--

SELECT pg_catalog.setval('muster.evidence_revision_seq', 1, false);


--
-- Name: attempts attempts_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.attempts
    ADD CONSTRAINT attempts_pkey PRIMARY KEY (job, task, number);


--
-- Name: commits commits_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.commits
    ADD CONSTRAINT commits_pkey PRIMARY KEY (one);


--
-- Name: evidence evidence_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.evidence
    ADD CONSTRAINT evidence_pkey PRIMARY KEY (revision);


--
-- Name: history history_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.history
    ADD CONSTRAINT history_pkey PRIMARY KEY (revision);


--
-- Name: jobs jobs_key_key; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.jobs
    ADD CONSTRAINT jobs_key_key UNIQUE (key);


--
-- Name: jobs jobs_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);


--
-- Name: leadership leadership_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.leadership
    ADD CONSTRAINT leadership_pkey PRIMARY KEY (one);


--
-- Name: leadership leadership_term_key; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.leadership
    ADD CONSTRAINT leadership_term_key UNIQUE (term);


--
-- Name: meta meta_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.meta
    ADD CONSTRAINT meta_pkey PRIMARY KEY (name);


--
-- Name: nodes nodes_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.nodes
    ADD CONSTRAINT nodes_pkey PRIMARY KEY (id);


--
-- Name: pools pools_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.pools
    ADD CONSTRAINT pools_pkey PRIMARY KEY (name);


--
-- Name: tokens tokens_pkey; Type: CONSTRAINT; Schema: muster; Owner: -
--

ALTER TABLE ONLY muster.tokens
    ADD CONSTRAINT tokens_pkey PRIMARY KEY (id);


--
-- Name: attempts_live; Type: INDEX; Schema: muster; Owner: -
--

CREATE INDEX attempts_live ON muster.attempts USING btree (job, task) WHERE (NOT ended);


--
-- Name: history_subject; Type: INDEX; Schema: muster; Owner: -
--

CREATE INDEX history_subject ON muster.history USING btree (subject, revision);


--
-- PostgreSQL database dump complete
--

\unrestrict YOWngsHcBOKeHN0OujdXl4WoSePEYtm5fFLKybszoAHy0cthxfVR2sSlRGGoWce

