"""Settings: what the environment may say, and the one line for what it may not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from caravan.settings import BadSettings, load_settings


def test_the_three_shared_names_have_no_prefix_and_the_rest_has() -> None:
    settings = load_settings({"POSTGRES_URL": "postgresql://db/caravan", "CARAVAN_PORT": "9000", "HOME": "/root"})

    assert (settings.postgres_url, settings.port) == ("postgresql://db/caravan", 9000)


def test_the_command_line_wins_and_silence_does_not() -> None:
    assert load_settings({"CARAVAN_PORT": "9000"}, port=7000, host=None).port == 7000
    assert load_settings({"CARAVAN_PORT": "9000"}, port=None).port == 9000


def test_an_empty_variable_is_an_absent_one() -> None:
    assert load_settings({"POSTGRES_URL": "", "KAFKA_BROKER": "", "CARAVAN_PORT": ""}).postgres_url is None


def test_origins_are_a_list_with_commas() -> None:
    assert load_settings({"CARAVAN_ORIGINS": "https://a.example, http://localhost:3000"}).origins == (
        "https://a.example",
        "http://localhost:3000",
    )


@pytest.mark.parametrize(
    ("environ", "given", "said"),
    [
        ({"CARAVAN_PRT": "1"}, {}, "CARAVAN_PRT is not a setting of this release: did you mean CARAVAN_PORT?"),
        ({"CARAVAN_PORT": "abc"}, {}, "CARAVAN_PORT: "),
        ({"CARAVAN_PORT": "0"}, {}, "CARAVAN_PORT: "),
        ({"CARAVAN_DEMO": "maybe"}, {}, "CARAVAN_DEMO: "),
        ({"POSTGRES_URL": "mysql://root:hunter2@db"}, {}, "POSTGRES_URL: must look like postgresql://"),
        ({"KAFKA_BROKER": "kafka"}, {}, "KAFKA_BROKER: must be host:port, or several with commas"),
        ({"KAFKA_BROKER": "kafka:9092,http://x:1"}, {}, "KAFKA_BROKER: must be host:port, or several with commas"),
        ({"CARAVAN_KAFKA_PREFIX": "a b"}, {}, "CARAVAN_KAFKA_PREFIX: "),
        ({"CARAVAN_KAFKA_PARTITIONS": "0"}, {}, "CARAVAN_KAFKA_PARTITIONS: "),
        ({"CARAVAN_KAFKA_RETENTION_HOURS": "800"}, {}, "CARAVAN_KAFKA_RETENTION_HOURS: "),
        ({"CARAVAN_KAFKA_USERNAME": "hunter2"}, {}, "CARAVAN_KAFKA_PASSWORD: set both CARAVAN_KAFKA_USERNAME and"),
        ({"CARAVAN_KAFKA_PASSWORD": "hunter2"}, {}, "CARAVAN_KAFKA_USERNAME: set both CARAVAN_KAFKA_USERNAME and"),
        ({"CARAVAN_KAFKA_SECURITY": "sasl_ssl"}, {}, "CARAVAN_KAFKA_SECURITY: sasl_ssl goes with CARAVAN_KAFKA_USER"),
        ({"CARAVAN_KAFKA_CA_FILE": "/no/such"}, {}, "CARAVAN_KAFKA_CA_FILE: there is no file /no/such"),
        ({"REDIS_URL": "cache:6379"}, {}, "REDIS_URL: must look like redis://"),
        ({"REDIS_URL": "http://:hunter2@cache"}, {}, "REDIS_URL: must look like redis://"),
        ({"REDIS_URL": "redis://:hunter2@"}, {}, "REDIS_URL: must look like redis://"),
        ({"REDIS_URL": "redis://cache:port"}, {}, "REDIS_URL: must look like redis://"),
        ({"REDIS_URL": "redis://cache/first"}, {}, "REDIS_URL: must look like redis://"),
        ({"REDIS_URL": "redis://cache?socket_timeout=9"}, {}, "REDIS_URL: must look like redis://"),
        ({"CARAVAN_ORIGINS": "example.com"}, {}, "CARAVAN_ORIGINS: example.com is not an origin"),
        ({"CARAVAN_SANDBOX_WEBHOOK_SECRET": "hunter2"}, {}, "CARAVAN_SANDBOX_WEBHOOK_SECRET: must be whsec_"),
        ({}, {"demo": True, "host": "0.0.0.0"}, "Demo mode listens on this machine only"),  # noqa: S104 - refused
        ({"STRIPE_KEY": "sk_live_hunter2"}, {"demo": True}, "STRIPE_KEY holds a live payment provider's key"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_without_secrets(
    environ: Mapping[str, str], given: dict[str, object], said: str
) -> None:
    with pytest.raises(BadSettings) as refused:
        load_settings(environ, **given)

    message = str(refused.value)
    assert message.startswith(said)
    assert "\n" not in message
    assert "hunter2" not in message


def test_a_live_key_is_nobodys_business_outside_the_demo() -> None:
    assert load_settings({"STRIPE_KEY": "sk_live_x"}).demo is False


@pytest.mark.parametrize(
    "url",
    ["redis://cache", "redis://:p%40ss@10.0.0.7:6380/2", "rediss://app:x@cache/?ssl_ca_certs=/etc/ca.pem",
     "unix:///run/redis.sock?db=1", "redis://[::1]:6379"],
)  # fmt: skip
def test_addresses_of_a_redis(url: str) -> None:
    assert load_settings({"REDIS_URL": url}).redis_url == url
