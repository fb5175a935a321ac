# syntax=docker/dockerfile:1
# palimpsest for the CPU. Build: `docker build -t palimpsest .`; run: deploy/compose.

FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ make pkg-config libssl-dev zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build

# The dependencies alone, in a layer that stays valid until the manifest or the lock changes.
COPY Cargo.toml Cargo.lock build.rs ./
RUN mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -rf src

COPY . .
# The stand-ins above are newer than the real files: cargo goes by times.
RUN touch src/main.rs src/lib.rs && cargo build --release --locked --bin palimpsest

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/palimpsest --shell /usr/sbin/nologin palimpsest \
    && install -d -o palimpsest -g palimpsest /var/lib/palimpsest
COPY --from=build /build/target/release/palimpsest /usr/local/bin/palimpsest
COPY --from=build /build/LICENSE /build/NOTICE /usr/share/doc/palimpsest/

USER palimpsest
WORKDIR /var/lib/palimpsest
VOLUME /var/lib/palimpsest
EXPOSE 8080
# Without curl in the image, bash asks for itself. /healthz says that the process is alive; /readyz is for the balancer.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 && printf 'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r -t 2 line <&3 && [[ $line == *' 200 '* ]]"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["palimpsest"]
CMD ["run", "--config", "/etc/palimpsest/palimpsest.toml"]
