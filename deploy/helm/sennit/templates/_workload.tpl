{{- /* A workload of deploy/kubernetes with this release's image and settings. Arguments: root, file, settings */ -}}
{{- define "sennit.workload" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $object := $root.Files.Get .file | fromYaml -}}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/instance" $root.Release.Name -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $object.metadata.labels "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version) -}}
{{- $pod := $object.spec.template.spec -}}
{{- $container := first $pod.containers -}}
{{- $_ := set $container "image" (printf "%s:%s" $values.image.repository ($values.image.tag | default $root.Chart.AppVersion)) -}}
{{- $_ := set $container "imagePullPolicy" $values.image.pullPolicy -}}
{{- with $values.imagePullSecrets }}{{ $_ := set $pod "imagePullSecrets" . }}{{ end -}}
{{- with .settings.resources }}{{ $_ := set $container "resources" . }}{{ end -}}
{{- with .settings.replicas }}{{ $_ := set $object.spec "replicas" . }}{{ end -}}
{{- if eq $object.kind "DaemonSet" -}}
{{- $_ := set $pod "tolerations" $values.agent.tolerations -}}
{{- $_ := set $pod "nodeSelector" (merge (dict) $pod.nodeSelector $values.agent.nodeSelector) -}}
{{- end -}}
{{- if and .settings.api $values.api.host -}}
{{- $host := dict "name" "KUBERNETES_SERVICE_HOST" "value" $values.api.host -}}
{{- $port := dict "name" "KUBERNETES_SERVICE_PORT" "value" ($values.api.port | toString) -}}
{{- $_ := set $container "env" (concat ($container.env | default list) (list $host $port)) -}}
{{- end -}}
{{- with .settings.annotations }}{{ $_ := set $object.spec.template.metadata "annotations" . }}{{ end -}}
{{ toYaml $object }}
{{- end -}}

{{- define "sennit.configuration" -}}
{{- $kube := dict -}}
{{- with .Values.cluster }}{{ $_ := set $kube "cluster" . }}{{ end -}}
{{- $wireguard := merge (dict "externalDevice" true) .Values.wireguard -}}
{{- $own := dict "mesh" .Values.mesh "site" .Values.site "registry" (dict "kube" $kube) "wireguard" $wireguard -}}
{{- with .Values.sites }}{{ $_ := set $own "sites" . }}{{ end -}}
{{- with .Values.protectedAddresses }}{{ $_ := set $own "protectedAddresses" . }}{{ end -}}
{{ toYaml (mergeOverwrite $own .Values.config) }}
{{- end -}}
