"""A Muster client in Python from nothing but the server's reflection and a client certificate.

    python client.py ADDRESS PKI_FOLDER -- /bin/echo hello

It has no generated code: it asks the server for its descriptors, so it shows that any gRPC client can steer a fleet.
"""

import sys
import uuid
from pathlib import Path

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2

# The name in every coordinator's certificate, whatever address it is reached by.
SERVER_NAME = "muster-coordinator"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def connect(address, pki, with_certificate=True):
    """A channel over TLS that trusts the fleet's CA only."""
    pki = Path(pki)
    key, chain = None, None
    if with_certificate:
        key, chain = (pki / "admin.key").read_bytes(), (pki / "admin.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes(), key, chain)
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", SERVER_NAME)])


class Fleet:
    """The services of muster.v1 as the server describes them."""

    def __init__(self, channel):
        self.channel = channel
        self.pool = descriptor_pool.DescriptorPool()
        files = self._described(["Jobs", "Nodes"])
        for name in list(files):
            self._add(files, name)

    def _described(self, services):
        """All files that describe the services, by name."""
        # The messages of v1 and v1alpha are the same; only the package in the method's name differs.
        ask = self.channel.stream_stream(
            REFLECTION,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest
        waiting = [request(file_containing_symbol=f"muster.v1.{service}") for service in services]
        files = {}
        while waiting:
            for answer in ask(iter([waiting.pop()]), timeout=30):
                for raw in answer.file_descriptor_response.file_descriptor_proto:
                    file = descriptor_pb2.FileDescriptorProto.FromString(raw)
                    if file.name not in files:
                        files[file.name] = file
                        waiting += [request(file_by_filename=name) for name in file.dependency if name not in files]
        return files

    def _add(self, files, name):
        """Adds a file after those that it imports, as the pool wants it."""
        file = files.pop(name, None)
        if file:
            for dependency in file.dependency:
                self._add(files, dependency)
            self.pool.AddSerializedFile(file.SerializeToString())

    def message(self, name, /, **fields):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"muster.v1.{name}"))(**fields)

    def call(self, service, method, request, timeout=60):
        """One call; a list of answers if the method streams them."""
        described = self.pool.FindServiceByName(f"muster.v1.{service}").methods_by_name[method]
        answer = message_factory.GetMessageClass(described.output_type)
        make = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        path = f"/muster.v1.{service}/{method}"
        call = make(path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString)
        return list(call(request, timeout=timeout)) if described.server_streaming else call(request, timeout=timeout)

    def nodes(self):
        return self.call("Nodes", "List", self.message("ListNodesRequest")).nodes

    def submit(self, arguments, without=()):
        body = self.message(
            "JobBody",
            arguments=[argument.encode() for argument in arguments],
            request=self.message("Resources", cpu_milli=100, memory_bytes=64 << 20, disk_bytes=16 << 20),
            without=list(without),
        )
        template = self.message("JobTemplate", name="from-python", body=body, tasks=1)
        request = self.message("SubmitRequest", idempotency_key=f"python-{uuid.uuid4()}", template=template)
        return self.call("Jobs", "Submit", request).job

    def wait(self, job):
        """Follows the job to its end; its last progress."""
        return self.call("Jobs", "Watch", self.message("WatchJobRequest", job=job, follow=True))[-1]

    def output(self, job):
        parts = self.call("Jobs", "Logs", self.message("LogsRequest", job=job, follow=True))
        return b"".join(part.data for part in parts)


def main():
    address, pki, _, *arguments = sys.argv[1:]
    with connect(address, pki) as channel:
        fleet = Fleet(channel)
        for node in fleet.nodes():
            print(f"{node.name} {node.state}")
        job = fleet.submit(arguments)
        end = fleet.wait(job)
        sys.stdout.buffer.write(fleet.output(job))
        print(f"job {job}: {end.summary.state}")


if __name__ == "__main__":
    main()
