"""What can go wrong on the way to the cloud, by who must act.

CloudError
├── CloudUnreachable      nobody answers: network, local cloud down         -> start it or restore the network
├── CloudMisconfigured    it answers and says no: credentials, stack, name  -> somebody changes a setting
│   ├── DeployError       CloudFormation gave up on a resource
│   ├── NoSuchName        no unit, or no job, has the name that was given      -> a typo: look it up
│   └── StackMissingError      nothing is deployed there
├── RepositoryFault       the update repository, a release or a key is not as it must be -> what the message says
├── NotYet                a release must not go out, or not like this           -> what the message says, then again
├── DidNotHappen          the demo waited in vain                               -> mend what the message names
└── LocalCloudError       the local cloud cannot start or is not what we pinned
"""


class CloudError(Exception):
    """Something between us and the cloud went wrong; the message says what to do next."""


class CloudUnreachable(CloudError, ConnectionError):
    """Nobody answers at the cloud's address."""


class CloudMisconfigured(CloudError):
    """The cloud answers and refuses; the message names the setting to change."""


class StackMissingError(CloudMisconfigured):
    """The stack is not deployed at this target."""


class NoSuchName(CloudMisconfigured):
    """The name of a unit or of a job that there is none of: a mistake on the command line."""


class DeployError(CloudMisconfigured):
    """CloudFormation refused the stack; the message carries the first resource's own reason."""


class NotYet(CloudError):
    """A release must not go out, or not like this; the message says what is missing."""


class DidNotHappen(CloudError):
    """What the demo was to show did not come; the message says what."""


class LocalCloudError(CloudError):
    """The local cloud cannot start, or is not the one that was pinned."""


class RepositoryFault(CloudError):
    """The update repository, a release for it, or a key is not as it must be; the message says what to do."""
