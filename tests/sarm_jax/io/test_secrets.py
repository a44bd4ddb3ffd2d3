"""Which environment variables are secrets, by their names and values."""

import huggingface_hub
import pytest

from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError

VALUE = "s3cr3t/Value+0123456789=="
SECRET_NAMES = (
    "GITHUB_PAT AZURE_DEVOPS_EXT_PAT DB_PASS SMTP_PASS DB_PASS1 WANDB_KEY WANDB_API_KEY FOO_AUTH "
    "REDISCLI_AUTH MYSQL_PWD DB_PWD LDAP_BIND_PW HF_TOKEN HUGGING_FACE_HUB_TOKEN GH_TOKEN "
    "HF_TOKENS MYTOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN OPENAI_API_KEY "
    "OPENAI_KEY OPENAI_KEY_2 APIKEY MYAPIKEY PGPASSWORD PGPASS SSHPASS SUDO_PASSWD GPG_PASSPHRASE "
    "KEY_PASSCODE CLIENT_SECRET DJANGO_SECRET_KEY SECRETS JWT_SECRET JWT AUTH_JWT BEARER "
    "HTTP_AUTHORIZATION OAUTH_CODE NPM_AUTH _AUTH SESSION_COOKIE COOKIES SENTRY_DSN SLACK_WEBHOOK "
    "STORAGE_CONNECTION_STRING AZURE_CONN_STR SSH_PRIVATE_KEY SSH_KEY DEPLOY_KEYS MASTER_KEY "
    "ENCRYPTION_KEY MASTERKEY GCP_CREDENTIALS GOOGLE_CREDENTIAL GIT_CREDS TWINE_CRED "
    "github_pat wandb_key dbPass gitHubPat apiKey fooAuth tokenizer_secret COHERE_KEY KEY PASS AUTH"
).split()
HARMLESS_NAMES = (
    "PATH PYTHONPATH LD_LIBRARY_PATH PATTERN SPATIAL_DIM COMPAT_MODE PASSENGER_COUNT PASSAGE "
    "COMPASS_HEADING BYPASS_CHECK AUTHOR GIT_AUTHOR_NAME AUTHORS XAUTHORITY KEYBOARD KEYMAP MONKEY "
    "TURKEY_REGION KEYWORDS GNOME_KEYRING_CONTROL TOKENIZERS_PARALLELISM TOKENIZER_NAME "
    "TOKENISER_MODE SECRETARY CREDITS ACCREDITED PWDLESS SPWD_MODE EDITOR LANG SHELL USER LOGNAME "
    "HOSTNAME XDG_SESSION_TYPE DBUS_SESSION_BUS_ADDRESS LS_COLORS DSNAME WEBHOOKS2GO_HOST JWTS "
    "SSH_AUTH_SOCK SSH_KEY_PATH TOKEN_FILE PASSWORD_FILE PASSWORD_STORE_DIR AUTH_TYPE KEY_COUNT "
    "SECRETS_DIR KEY_FOLDER TOKEN_HOME XLA_FLAGS JAX_PLATFORMS OMP_NUM_THREADS I_MPI_PIN_DOMAIN"
).split()
HARMLESS_VALUES = {  # of variables that are named like a secret
    "SSH_AUTH_SOCK": "/tmp/ssh-XXXXabc/agent.1234",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/someone/key.json",
    "SSH_KEY": "~/.ssh/id_ed25519.pub",
    "TLS_KEY": "./certs/server.pem",
    "CLIENT_KEY": "file:///etc/client.pem",
    "PWD": "/home/someone/secret-project",
    "OLDPWD": "relative-directory",
    "MAX_TOKENS": "100000000",
    "KEY_LENGTH": "12345678",
    "USE_TOKEN": "false",
    "NO_AUTH": "true",
    "SHOW_PASSWORD": "always",  # fewer than 8 characters
}


@pytest.fixture
def collected(monkeypatch):
    """Returns a function that collects the secrets of an environment with these variables alone."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def collect(**variables: str) -> None:
        monkeypatch.setattr("os.environ", variables)
        secrets.collect()

    yield collect
    monkeypatch.undo()
    secrets.collect()


def test_names_of_secrets(collected):
    missed = []
    for name in SECRET_NAMES:
        collected(**{name: VALUE})
        if secrets.redact(f"found {VALUE}") != f"found [{name}]":
            missed.append(name)
        with (
            pytest.raises(InputError, match="holds a secret") if name not in missed else no_error()
        ):
            secrets.refuse_secrets([f"--policy_model={VALUE}"])
    assert not missed and len(SECRET_NAMES) > 60


def no_error():
    import contextlib

    return contextlib.nullcontext()


def test_names_of_what_is_no_secret(collected):
    hidden = []
    for name in HARMLESS_NAMES:
        collected(**{name: VALUE})
        if VALUE not in secrets.redact(f"found {VALUE}"):
            hidden.append(name)
    assert not hidden and len(HARMLESS_NAMES) > 50


@pytest.mark.parametrize("name", HARMLESS_VALUES)
def test_values_that_are_no_secret(collected, name, tmp_path):
    collected(**{name: HARMLESS_VALUES[name]})
    text = f"--workdir={HARMLESS_VALUES[name]}"
    assert secrets.redact(text) == text
    (tmp_path / "key").write_text("")
    collected(**{name: f"{tmp_path}/key"})
    assert "[" not in secrets.redact(f"{tmp_path}/key")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "/bCdEfGhIjKl/MnOpQrStUvWxYz0123456789abc"),  # base64, no path
        ("DB_PASS", "12345678"),
        ("MYSQL_PWD", "87654321"),
        ("USER_PASSWORD", "0123456789"),
    ],
)
def test_secrets_that_look_like_a_path_or_a_number(collected, name, value):
    collected(**{name: value})
    assert secrets.redact(f"x{value}") == f"x[{name}]"


def test_the_password_in_an_address(collected):
    url = "postgres://someone:p4ssw0rd!x@host:5432/db"
    collected(DATABASE=url, HTTPS_PROXY="http://:longpassword@proxy", HOME="http://host:80/a@b")
    assert secrets.redact(f"cannot open {url}") == (
        "cannot open postgres://someone:[DATABASE]@host:5432/db"
    )
    assert secrets.redact("longpassword") == "[HTTPS_PROXY]"
    assert secrets.redact("someone host:80/a@b 5432") == "someone host:80/a@b 5432"


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        ("https://host:7860/?write_token=abcDEF0123456789", "abcDEF0123456789"),
        ("https://host/path?x=1&api_key=abcDEF0123456789#top", "abcDEF0123456789"),
        ("https://host/?page=abcDEF0123456789", None),
        ("host?token=abcDEF0123456789", None),  # no address
    ],
)
def test_secrets_in_an_address(collected, variable, secret):
    collected(TRACKIO_SERVER_URL=variable)
    text = "found abcDEF0123456789"
    assert secrets.redact(text) == ("found [TRACKIO_SERVER_URL]" if secret else text)


KEY = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    ("content", "hidden"),
    [
        (f"machine host\n  login user\n  password {KEY}\n", True),
        (f"machine x login me password short\nmachine h login user password {KEY}", True),
        (f"machine host login someone password {KEY}", False),  # another program's
        ("machine host login user password anonymous", False),
        (f"machine host login user passwort {KEY}", False),  # no netrc file
        (b"\xff\xfe", False),
        (None, False),
    ],
)
def test_the_login_of_wandb_in_a_netrc_file(collected, tmp_path, content, hidden):
    path = tmp_path / "netrc"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    collected(NETRC=str(path))
    assert secrets.redact(f"x {KEY}") == ("x [WANDB_API_KEY]" if hidden else f"x {KEY}")
    assert secrets.redact("anonymous") == "anonymous"
