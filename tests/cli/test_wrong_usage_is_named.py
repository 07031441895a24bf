import pytest

GOOD = {"id": 1, "prompt": "two?", "response": "four"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "x"', "Invalid JSON"),
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
        ("score", ["in", "out", "--model=x", "--device=gpu"], "--device"),
        ("score", ["/dev/null", "-", "--endpoint=http://x"], "--endpoint: an endpoint is a gRPC target"),
        ("rank", [], "give --prompt and --response, or --input FILE"),
        ("rank", ["--prompt=x"], "no response"),
        ("rank", ["--response=x"], "give the prompt"),
        ("rank", ["--prompt=x", "--response"], "--response: expected one argument"),
        ("rank", ["--input=x", "--prompt=y"], "--input brings its own prompts"),
        ("rank", ["--prompt=x", "--responses-file=/no/such"], "/no/such: No such file or directory"),
        ("rank", ["--promt=x"], "did you mean '--prompt'?"),
        ("models", ["lst"], "no action 'lst'; did you mean 'list'?"),
        ("models", ["load", "x"], "usage: rewardserve models load NAME SOURCE"),
        ("models", ["list", "x"], "usage: rewardserve models list"),
        ("models", ["--jsn"], "flag --jsn is unknown; did you mean '--json'?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli, verb, arguments, said):
    ran = cli(verb, *arguments)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert ran.err.startswith(f"rewardserve {verb}: ") and said in ran.err


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


@pytest.mark.parametrize("verb", ["score", "rank", "models"])
def test_help_lists_every_option_and_exits_with_0(verb, capsys):
    from rewardserve.cli import models, rank, score

    with pytest.raises(SystemExit) as exit_:
        {"score": score, "rank": rank, "models": models}[verb].run(["--help"])
    assert exit_.value.code == 0 and "--endpoint" in capsys.readouterr().out
