import pytest
from rewardserve.options import OTHER_VERBS

GOOD = {"id": 1, "prompt": "two?", "response": "four"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "x"', "Invalid JSON: EOF while parsing an object at column 14"),
        ("[1]", "Input should be an object"),
        ({"responses": ["x"]}, "prompt: is missing"),
        ({"promt": "x", "response": "y"}, "prompt: is missing; is 'promt' a misspelling?"),
        ({"prompt": "x"}, "responses: is missing"),
        ({"prompt": "", "response": "y"}, "prompt: String should have at least 1 character"),
        ({"prompt": "x", "responses": []}, "responses: List should have at least 1 item"),
        ({"prompt": "x", "responses": "y"}, "responses: Input should be a valid array"),
        ({"prompt": "x", "rendered": "x", "response": "y"}, "prompt and rendered: give one of them"),
        ({"messages": [{"role": "user"}], "response": "y"}, "messages[0].content: Field required"),
        ({"messages": [{"role": "a", "content": "b", "name": "c"}], "response": "y"}, "messages[0].name: Extra"),
        ({"prompt": "x", "response_token_ids": [[1, -1]]}, "response_token_ids[0][1]: Input should be greater"),
        ({"id": 1.5, "prompt": "x", "response": "y"}, "id: must be a string or an integer"),
        ({"id": 1, "prompt": "x", "response": "y"}, "id: 1 stands on an earlier line already"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field_and_what_came_before_is_scored(cli, server, rows_file, out, row, said):
    source = rows_file(GOOD, "", row, {"prompt": "never read", "response": "x"})
    ran = cli("score", source, out, server.endpoint)
    assert ran.code == 2 and f"INPUT line 3: {said}" in ran.err
    assert len(out.read_text().splitlines()) == 1
    assert "scored 1 row" in ran.err and ran.err.count("\n") == 2


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("score", ["in", "out", "--overflw=error"], "flag --overflw is unknown; did you mean '--overflow'?"),
        ("score", ["in"], "the following arguments are required: OUTPUT"),
        ("score", ["in", "out", "more"], "one argument too many: more"),
        ("score", ["in", "out", "--window=0"], "--window (or REWARDSERVE_SCORE_WINDOW): "),
        ("score", ["in", "out", "--overflow=cut"], "'cut'"),
        ("score", ["in", "out", "--timeout=inf"], "--timeout"),
        ("score", ["/no/such/file", "out"], "INPUT /no/such/file: No such file or directory"),
        ("score", ["/dev/null", "/no/such/folder/out"], "OUTPUT /no/such/folder/out: No such file or directory"),
        ("score", ["in", "out", "--model=x", "--endpoint=y"], "give one of them"),
        ("score", ["in", "out", "--dtype=float32"], "--dtype is the server's to choose; it goes with --model"),
        ("score", ["in", "out", "--model=x", "--device=gpu"], "_DEVICE): give auto, cpu, cuda or cuda:N (got 'gpu')"),
        ("score", ["/dev/null", "-", "--endpoint=http://x"], "--endpoint: an endpoint is a gRPC target"),
        ("score", ["/dev/null", "-", "--endpoint=localhost"], "'localhost' has no port; give HOST:PORT"),
        ("health", ["--endpoint=localhost"], "'localhost' has no port; give HOST:PORT"),
        ("rank", [], "give --prompt and --response, or --input FILE"),
        ("rank", ["--prompt=x"], "no response"),
        ("rank", ["--response=x"], "give the prompt"),
        ("rank", ["--prompt=x", "--response"], "--response: expected one argument"),
        ("rank", ["--prompt=x", "--response", "--y"], "one that begins with - is given as --flag=VALUE"),
        ("rank", ["--input=x", "--prompt=y"], "--input brings its own prompts"),
        ("rank", ["--prompt=x", "--responses-file=/no/such"], "/no/such: No such file or directory"),
        ("rank", ["--promt=x"], "did you mean '--prompt'?"),
        ("eval", [], "the following arguments are required: INPUT"),
        ("eval", ["in", "--suite"], "flag --suite is unknown; did you mean '--suites'?"),
        ("eval", ["in", "--min-gap=-1"], "--min-gap"),
        ("eval", ["in", "--seed=-1"], "--seed"),
        ("eval", ["in", "--model=x", "--endpoint=y"], "give one of them"),
        ("eval", ["in", "--calibration-kind=affine"], "--calibration-kind goes with --fit-calibration FILE"),
        ("eval", ["in", "--calibration-kind=platt", "--fit-calibration=x"], "'platt'"),
        (
            "eval",
            ["in", "--fit-calibration=/no/such/c.json"],
            "--fit-calibration /no/such/c.json: /no/such is no folder",
        ),
        ("eval", ["in", "--picture=/no/such/p.png"], "--picture /no/such/p.png: /no/such is no folder to write to"),
        ("eval", ["in", "--picture=p.gif"], "--picture p.gif: its name ends in one of .png, .svg, .pdf"),
        ("eval", ["/no/such/file"], "INPUT /no/such/file: No such file or directory"),
        ("eval", ["/dev/null"], "INPUT /dev/null: there is no row in it"),
        ("models", ["lst"], "no action 'lst'; did you mean 'list'?"),
        ("models", ["load", "x"], "usage: rewardserve models load NAME SOURCE"),
        ("models", ["list", "x"], "usage: rewardserve models list"),
        ("models", ["update", "a", "x", "--canaries=/no/such"], "--canaries does nothing for update: it is for swap; "),
        ("models", ["update", "a", "x", "--dtype=float32"], "--dtype does nothing for update: it is for load and swap"),
        ("models", ["load", "a", "x", "--keep-previous"], "--keep-previous does nothing for load: it is for swap"),
        ("models", ["rollback", "a", "--min-rank-correlation=0"], "--min-rank-correlation does nothing for rollback"),
        ("models", ["swap", "a", "x", "--canaries=/dev/full/x"], "--canaries /dev/full/x: Not a directory"),
        ("score", ["/dev/null", "-", "--timeout=1e10"], "--timeout"),
        ("score", ["in", "out", "--model=x", "--threads=100000"], "--threads"),
        ("score", ["/dev/null", "-", "--name=\udcff"], r"'\udcff' is not UTF-8"),
        ("score", ["/dev/null", "-", "--endpoint=\udcff:1"], r"'\udcff:1' is not UTF-8"),
        ("rank", ["--prompt-file=-", "--responses-file=-"], "stdin can hold the prompt or the responses, not both"),
        ("rank", ["--prompt=x", "--responses-file=/dev/null"], "--responses-file is empty"),
        ("rank", ["--prompt=\udcff", "--response=x"], r"'\udcff' is not UTF-8"),
        ("health", ["--endpoint=http://x"], "--endpoint: an endpoint is a gRPC target"),
        ("health", ["--endpoint="], "--endpoint: an endpoint is a gRPC target"),
        ("health", ["--timeout=inf"], "--timeout"),
        ("health", ["--timout=1"], "did you mean '--timeout'?"),
        ("models", ["--jsn"], "flag --jsn is unknown; did you mean '--json'?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli, verb, arguments, said):
    ran = cli(verb, *arguments)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert ran.err.startswith(f"rewardserve {verb}: ") and said in ran.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"prompt": 5, "chosen": "a", "rejected": "b"}', "prompt: Input should be a valid string"),
        (
            b'{"messages": [{"role": "user", "content": "x", "name": "y"}], "chosen": "a", "rejected": "b"}',
            "name: Extra",
        ),
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "Invalid JSON"),
        (b'{"chosen": "a", "rejected": "b"}', "prompt: is missing"),
        (b'{"prompt": "x", "chosen": "a"}', "rejected: Field required"),
    ],
)
def test_a_canary_that_is_none_is_named_by_its_line(cli, tmp_path, row, said):
    file = tmp_path / "canaries"
    good = '{"prompt": "x\u2028y", "chosen": "a\x85", "rejected": "b"}'.encode()
    file.write_bytes(b"\n".join((good, b"", row, b"")))
    ran = cli("models", "swap", "a", "x", f"--canaries={file}", "--endpoint=127.0.0.1:1")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert f"--canaries {file}, line 3: " in ran.err and said in ran.err


def test_an_environment_variable_is_an_option_and_a_flag_wins_over_it(cli, server, rows_file, monkeypatch):
    monkeypatch.setenv("REWARDSERVE_SCORE_ENDPOINT", server.endpoint.removeprefix("--endpoint="))
    monkeypatch.setenv("REWARDSERVE_SCORE_NAME", "nobody")
    source = rows_file(GOOD)
    assert "no model 'nobody'" in cli("score", source, "-").err
    assert cli("score", source, "-", "--name=toy").rows[0]["id"] == 1


def test_an_unknown_environment_variable_is_refused_with_the_nearest_one(cli, monkeypatch):
    monkeypatch.setenv("REWARDSERVE_SCORE_WINDW", "3")
    ran = cli("score", "in", "out")
    assert ran.code == 2 and "did you mean 'REWARDSERVE_SCORE_WINDOW'?" in ran.err


def test_what_a_server_says_back_cannot_steer_the_terminal(cli, server):
    ran = cli("models", "get", "a\x1b[31mb", server.endpoint)
    assert ran.code == 1 and "\x1b" not in ran.err and r"a\u001b[31mb" in ran.err


# -- the config file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["score", "rank", "eval", "models", "health"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[scroe]\nwindow = 3", "table 'scroe' in {} is unknown; did you mean 'score'?"),
        ("prot = 3", "key 'prot' in {} is unknown; did you mean 'port'?"),
        ("timeout = 3", "key 'timeout' in {} stands at the top, where the server's do; put it into its table"),
        ("config = 'x'", "key 'config' in {}: a file cannot name another"),
        ("[{verb}]\nconfig = 'x'", "key 'config' in {}: a file cannot name another"),
        ("[{verb}]\ntimeut = 3", "key 'timeut' in {} is unknown; did you mean 'timeout'?"),
        ("[{verb}]\ntimeout = true", "--timeout"),
        *((f"{other} = 3", f"key '{other}' in {{}} must be a table: [{other}]") for other in OTHER_VERBS),
    ],
)
def test_a_key_that_no_verb_knows_is_refused_by_all(cli, tmp_path, verb, text, said):
    file = tmp_path / "rewardserve.toml"
    file.write_text(text.replace("{verb}", verb))
    ran = cli(verb, "--config", file, *{"score": ["in", "out"], "eval": ["in"]}.get(verb, []))
    assert ran.code == 2 and said.replace("{}", str(file)) in ran.err and ran.err.count("\n") == 1


def test_a_file_may_hold_the_options_of_the_server_and_of_every_verb(cli, server, rows_file, tmp_path):
    file = tmp_path / "rewardserve.toml"
    endpoint = server.endpoint.removeprefix("--endpoint=")
    file.write_text(f"port = 3\nmodel = ['a=/x']\n[score]\nendpoint = '{endpoint}'\n[models]\njson_output = true\n")
    assert cli("score", rows_file(GOOD), "-", "--config", file).rows[0]["id"] == 1


@pytest.mark.parametrize("verb", ["score", "rank", "eval", "models", "health"])
def test_help_lists_every_option_and_exits_with_0(verb, capsys):
    from rewardserve.cli import eval as eval_
    from rewardserve.cli import health, models, rank, score

    verbs = {"score": score, "rank": rank, "eval": eval_, "models": models, "health": health}
    with pytest.raises(SystemExit) as exit_:
        verbs[verb].run(["--help"])
    assert exit_.value.code == 0 and "--endpoint" in capsys.readouterr().out
