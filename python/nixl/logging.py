"""Logging of the Python side: loggers below ``nixl``, level from NIXL_LOG_LEVEL. Importing changes no global state."""
import logging as _logging
import os as _os
import sys as _sys
import threading as _threading

TRACE = 5
_LEVELS = {"TRACE": TRACE, "DEBUG": _logging.DEBUG, "INFO": _logging.INFO, "WARN": _logging.WARNING,
           "ERROR": _logging.ERROR, "FATAL": _logging.CRITICAL}

LOGGING_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "nixl": {
            "format": "%(asctime)s NIXL %(levelname)-7s %(filename)s:%(lineno)d %(message)s",
            "datefmt": "%Y-%m-%d %H:%M:%S",
        }
    },
    "handlers": {"nixl": {"class": "logging.StreamHandler", "formatter": "nixl", "stream": "ext://sys.stdout"}},
    "loggers": {"nixl": {"handlers": ["nixl"], "level": "INFO", "propagate": False}},
}

_set_up = False
_lock = _threading.Lock()


def _apply(config):
    """What logging.config.dictConfig does with LOGGING_CONFIG, without the time its import takes."""
    formatter = config["formatters"]["nixl"]
    handler = _logging.StreamHandler(_sys.stdout)
    handler.setFormatter(_logging.Formatter(formatter["format"], formatter["datefmt"]))
    logger = _logging.getLogger("nixl")
    logger.addHandler(handler)
    logger.setLevel(config["loggers"]["nixl"]["level"])
    logger.propagate = config["loggers"]["nixl"]["propagate"]


def setup_logging():
    """Configures the logger ``nixl`` once, unless the application has given it handlers already."""
    global _set_up
    with _lock:
        if _set_up:
            return
        _set_up = True
        if not _logging.getLogger("nixl").handlers:
            _apply(LOGGING_CONFIG)
    set_log_level_by_env(_logging.getLogger("nixl"))


def set_log_level_by_env(logger):
    """Sets the logger's level from NIXL_LOG_LEVEL (TRACE DEBUG INFO WARN ERROR FATAL, any case)."""
    text = _os.environ.get("NIXL_LOG_LEVEL", "")
    if not text:
        return
    level = _LEVELS.get(text.upper())
    if level is None:
        logger.warning("NIXL_LOG_LEVEL is '%s'; allowed: %s", text, " ".join(_LEVELS))
    else:
        logger.setLevel(level)


def get_logger(name):
    """The logger ``nixl.<name without leading underscores>``."""
    setup_logging()
    return _logging.getLogger("nixl." + name.lstrip("_"))
