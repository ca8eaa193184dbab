"""Removing objects of an S3 server: what the benchmark needs and the backend does not offer. Signed by AWS Signature 4."""

import datetime
import hashlib
import hmac
import http.client
import os
import sys
import urllib.parse


def _setting(params, name, *variables):
    return next((value for value in (params.get(name), *map(os.environ.get, variables)) if value), "")


def delete(params, keys):
    """Removes the keys from the bucket of OBJ's parameters; says what could not be removed."""
    bucket = _setting(params, "bucket", "AWS_DEFAULT_BUCKET")
    region = _setting(params, "region", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = _setting(params, "endpoint_override", "AWS_ENDPOINT_OVERRIDE", "AWS_ENDPOINT_URL") or f"s3.{region}.amazonaws.com"
    if "://" not in endpoint:
        endpoint = f"{params.get('scheme') or 'https'}://{endpoint}"
    url = urllib.parse.urlparse(endpoint)
    virtual = params.get("use_virtual_addressing") == "true"
    host = f"{bucket}.{url.netloc}" if virtual else url.netloc
    keys_of = (_setting(params, "access_key", "AWS_ACCESS_KEY_ID"), _setting(params, "secret_key", "AWS_SECRET_ACCESS_KEY"),
               _setting(params, "session_token", "AWS_SESSION_TOKEN"))
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection, failed = kind(host, timeout=10), []
    for key in keys:
        path = urllib.parse.quote(f"/{key}" if virtual else f"/{bucket}/{key}")
        try:
            connection.request("DELETE", path, headers=_signed(host, path, region, *keys_of))
            reply = connection.getresponse()
            reply.read()
            if reply.status not in (200, 204, 404):
                failed.append(f"{key}: HTTP {reply.status}")
        except (OSError, http.client.HTTPException) as error:
            failed.append(f"{key}: {error}")
            connection.close()
    if failed:
        print(f"note: {len(failed)} objects were not removed, first {failed[0]}", file=sys.stderr)


def _signed(host, path, region, access, secret, token):
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
    if token:
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    canonical = "\n".join(["DELETE", path, "", *(f"{n}:{headers[n]}" for n in sorted(headers)), "", names, "UNSIGNED-PAYLOAD"])
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret}".encode()
    for part in (now[:8], region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    headers["Authorization"] = f"AWS4-HMAC-SHA256 Credential={access}/{scope},SignedHeaders={names},Signature={signature}"
    return headers
