"""The gateway: nginx in front of SuperLink, which lets hospitals reach the fleet API and nothing else.

Flower serves three APIs on one port, and whoever reaches the other two can run code at every site. nginx matches paths
after it has decoded and resolved them, so no spelling of another path passes for one below /v1/fleet/.
"""

import os
from pathlib import Path

BODY_MB = 128
"""Of one request: Flower sends tensors in pieces far smaller than this."""

CONFIGURATION = """\
# Written by polyclinic; a change is lost when it is written anew.
{user}daemon off;
worker_processes 2;
pid "{folder}/nginx.pid";
error_log "{folder}/error.log" warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path "{folder}/body";
    proxy_temp_path "{folder}/proxy";
    fastcgi_temp_path "{folder}/fastcgi";
    uwsgi_temp_path "{folder}/uwsgi";
    scgi_temp_path "{folder}/scgi";

    client_max_body_size {body}m;
    client_header_timeout 10s;
    client_body_timeout 20s;
    send_timeout 60s;
    keepalive_timeout 75s;
    large_client_header_buffers 4 8k;
    limit_req_zone $binary_remote_addr zone=rate:10m rate=100r/s;
    limit_conn_zone $binary_remote_addr zone=open:10m;

    server {{
        listen {listen} ssl;
        ssl_certificate "{home}/server.crt";
        ssl_certificate_key "{home}/server.key";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_tickets off;
        limit_req zone=rate burst=400 nodelay;
        limit_conn open 64;

        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate "{home}/authority.crt";
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_http_version 1.1;
        proxy_read_timeout 300s;

        location /v1/fleet/ {{ proxy_pass https://127.0.0.1:{port}; }}
        location = /health {{ proxy_pass https://127.0.0.1:{port}; }}
        location = /v1/fleet {{ return 403; }}
        location / {{ return 403; }}
    }}
}}
"""


def configuration(home: Path, listen: str, superlink_port: int) -> str:
    """nginx's configuration, for a coordinator's folder: TLS on `listen` (address:port), SuperLink on loopback."""
    # nginx started by root would have its workers be nobody, who may not write here. Do not start it as root.
    user = "user root;\n" if os.geteuid() == 0 else ""
    folder = home / "gateway"
    return CONFIGURATION.format(home=home, folder=folder, listen=listen, port=superlink_port, body=BODY_MB, user=user)
